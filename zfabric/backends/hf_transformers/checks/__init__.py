"""What is asked of a model once it is loaded: whether its rows say beside others what each says alone."""
