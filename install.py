"""The WebUI runs this before it loads the extension. Everything the extension needs, the WebUI brings."""

import sys

if sys.version_info < (3, 10):
    sys.stderr.write("sag-pag: Python 3.10 or newer is needed, this is " + sys.version.split()[0] + "\n")
