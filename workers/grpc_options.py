"""How a worker's gRPC connections behave: one table for its server and for the channels it opens."""

# Of a prompt of 2^20 tokens, at most 5 bytes each; by default it is 4 MiB, and one longer message ends a session.
# The gateway's end has the same.
MAX_MESSAGE_BYTES = 64 * 2**20

# A peer that was cut off without a word is noticed within 3 s.
_KEEPALIVE = (
    ("grpc.keepalive_time_ms", 1000),
    ("grpc.keepalive_timeout_ms", 2000),
    ("grpc.http2.ping_timeout_ms", 2000),  # by default a minute, whatever the keepalive timeout says
)

CHANNEL_OPTIONS = (
    *_KEEPALIVE,
    # Who restarts at an old address must be found again within about a second.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
    # A new channel must not inherit the back-off of an old one to the same address.
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
)

SERVER_OPTIONS = (
    *_KEEPALIVE,
    # Without it a second worker on the same port would silently take half of the connections.
    ("grpc.so_reuseport", 0),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 300),
    ("grpc.http2.max_ping_strikes", 0),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
)
