"""Generated word problems, on which the embedded tiny model learns."""
