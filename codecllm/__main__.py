"""`python -m codecllm`: the command line."""

from codecllm.cli import main

if __name__ == "__main__":
    main()
