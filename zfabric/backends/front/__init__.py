"""What all backends do alike before an engine sees a request."""
