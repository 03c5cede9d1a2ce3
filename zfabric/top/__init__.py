"""The live view of a fabric in a terminal: `zfabric top`. Needs textual, which the extra zfabric[cli] brings."""
