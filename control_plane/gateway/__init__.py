"""The public face: OpenAI-compatible HTTP and gRPC in front of the worker pools.

`app` and `grpc_server` speak to clients, `dispatch` to workers; they meet in `backend.Dispatcher`. No tensors here,
and no scheduling:
a request is validated, rendered, tokenized and handed on; what comes back is text.
"""
