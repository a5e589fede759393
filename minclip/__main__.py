import sys

from minclip.cli import main

sys.exit(main())
