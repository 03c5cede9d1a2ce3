"""What bytes mean: message kinds, typed message structs, and the codec between them."""
