"""``python -m circuit_tracer_qk``."""

import sys

from circuit_tracer_qk.cli import main

sys.exit(main())
