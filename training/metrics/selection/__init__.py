"""How much selection keeps, and whether it looks at the right place."""
