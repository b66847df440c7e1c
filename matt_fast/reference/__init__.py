"""The reference library's interface, `MATT` and its settings, over the parts that `transfer` is made of."""
