"""The one exception that opdlab raises on bad input."""


class OpdlabError(Exception):
    """Bad input, said in one sentence that names the thing and the remedy.

    The command line prints the sentence alone and exits with status 2; in a notebook it is the last
    line of the traceback. Nothing that was computed before is removed.
    """
