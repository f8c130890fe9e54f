"""A name or a folder -> local files. The only room that talks to the network."""

from codecllm.hub.resolve import ModelFiles, resolve

__all__ = ["ModelFiles", "resolve"]
