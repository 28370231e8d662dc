"""``python -m jmp_lite``."""

from jmp_lite.cli import main

raise SystemExit(main())
