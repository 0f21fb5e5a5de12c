"""Generated word problems: what the embedded tiny model learns on."""
