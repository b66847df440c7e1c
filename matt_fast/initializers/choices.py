"""Names of initialisers. Imports nothing, so that arguments can be checked before torch is imported."""

PIECES = ("mean", "length-mean", "first-piece", "last-piece", "exponential-first", "exponential-last")
METHODS = (*PIECES, "random", "zero")
INITS = (
    *METHODS,
    "composed",
    "contextual",
    "focus",
    "omp",
    "omp-self",
    "linear-map",
    "wechsel",
    "transtokenizers",
    "tokalign",
)
FROM_STATES = ("composed", "contextual")  # of the whole teacher, in texts
INIT_HEADS = ("same", "boundary", *(name for name in INITS if name not in FROM_STATES))
FROM_TEXTS = (*FROM_STATES, "focus", "omp-self", "tokalign")
FROM_DONOR = ("omp", "linear-map")
FROM_PAIRS = ("wechsel", "transtokenizers")  # of texts and their translations
