"""Names of initialisers. Imports nothing, so that arguments can be checked before torch is imported."""

METHODS = ("mean", "length-mean", "random", "zero")
INITS = (*METHODS, "contextual", "focus", "omp", "omp-self", "wechsel", "transtokenizers", "tokalign")
INIT_HEADS = ("same", "boundary")
FROM_TEXTS = ("contextual", "focus", "omp-self", "tokalign")
FROM_PAIRS = ("wechsel", "transtokenizers")  # of texts and their translations
