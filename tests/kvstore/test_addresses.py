import pytest

from kvstore.addresses import TcpAddress, UnixAddress, parse_address


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("tcp://10.0.0.3:4002", TcpAddress(host="10.0.0.3", port=4002)),
        ("tcp://worker-0.penstock:0", TcpAddress(host="worker-0.penstock", port=0)),
        ("tcp://[::1]:4002", TcpAddress(host="::1", port=4002)),
        ("unix:///run/a b.sock", UnixAddress(path="/run/a b.sock")),
    ],
)
def test_an_address_reads_back_as_it_is_written(text: str, address: TcpAddress | UnixAddress) -> None:
    assert parse_address(text) == address
    assert str(address) == text


@pytest.mark.parametrize(
    "text",
    ["", "tcp://", "tcp://host", "tcp://host:99999", "tcp://host:x", "tcp://host:1/path", "tcp://[::1:1",
     "unix://relative", "unix://", "http://host:1", "10.0.0.3:4002"],
)  # fmt: skip
def test_anything_else_is_refused_by_name(text: str) -> None:
    with pytest.raises(ValueError, match="not a data address"):
        parse_address(text)
