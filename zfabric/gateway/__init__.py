"""An HTTP door to a fabric, in the forms of OpenAI's API, for programs that speak it. Needs the `gateway` extra to be served."""
