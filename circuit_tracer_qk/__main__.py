"""``python -m circuit_tracer_qk``."""

import sys

from circuit_tracer_qk.cli.main import main

sys.exit(main())
