"""`python -m relrep_onnx`: the command line."""

from relrep_onnx.cli import main

if __name__ == "__main__":
    main()
