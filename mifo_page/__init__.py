"""`python -m mifo_page`: a page to draw on."""

MAX_FILE = 32 * 2**20  # bytes of an upload
MAX_SENT = MAX_FILE * 4 // 3  # bytes of a request: a file in base64
MIGE_MODEL = "toybox"  # which MIGE the page uses
