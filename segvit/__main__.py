"""`python -m segvit` is the same program as `segvit`."""

from segvit.cli import main

raise SystemExit(main())
