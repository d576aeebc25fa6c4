"""``python -m nnunet_ssl.commands VERB ...``: ``nnUNetv2_ssl_VERB`` without its executable."""

import importlib
import sys

if __name__ == "__main__":
    importlib.import_module(f"nnunet_ssl.commands.{sys.argv.pop(1)}").main()
