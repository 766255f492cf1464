"""optimum's own export of a model: `python optimum_export.py MODEL FOLDER`; prints the folder as JSON."""

import json
import sys

from optimum.exporters.onnx import main_export

main_export(sys.argv[1], output=sys.argv[2], task="text-generation-with-past", do_validation=False)
print(json.dumps(sys.argv[2]))
