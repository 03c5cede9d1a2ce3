"""Real models that come in wheels: found, put into the form that engines read, and cached."""
