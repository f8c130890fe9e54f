"""A name or a folder -> local files, and back. The only room that talks to the network."""

from codecllm.hub.failures import check_environment, no_requests
from codecllm.hub.remote import RemoteContainer, open_remote
from codecllm.hub.resolve import ModelFiles, resolve
from codecllm.hub.upload import BaseModel, Upload, check_login, read_base_model, upload_container

__all__ = [
    "BaseModel",
    "ModelFiles",
    "RemoteContainer",
    "Upload",
    "check_environment",
    "check_login",
    "no_requests",
    "open_remote",
    "read_base_model",
    "resolve",
    "upload_container",
]
