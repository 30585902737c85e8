"""What a server allows: everything that a client could make large, slow or many has a limit."""

from dataclasses import dataclass, field

MIB = 2**20


@dataclass(frozen=True)
class Limits:
    """Limits of one request, and of all of them together.

    Args:
        body_bytes: of a request's body.
        memory_bytes: bodies and decoded pictures of all requests that are here at once.
        pixels: of a picture, told by its header before anything is decoded.
        side_ratio: of a picture's longer side to its shorter one.
        images: in one request.
        tokens: of an answer; more is refused.
        default_tokens: of an answer whose request names no number.
        choices: `n` of a request.
        inputs, input_characters: of an embedding request.
        json_depth, json_values: of a body; deeper or more is refused before it is used.
        schema_bytes: of a JSON schema that an answer shall follow.
        attention_bytes: of all attention weights that one look at an answer keeps.
        header_seconds, body_seconds: for a client to send them.
        write_seconds: for a client to read what waits for it.
        request_seconds: for an answer; what is there by then is the answer.
        fetch_seconds: for a picture from another server.
        shutdown_seconds: for what still runs when the server is asked to stop.
        connections: open at once.
        line: embedding requests of a model, looks at answers, and names to look up, that wait for those that run.
        lookups: names of pictures' addresses that are looked up at once.
        pending: questions with pictures that are read and prepared at once, as many with forms of their answers, and as
            many of words alone; more wait.
    """

    body_bytes: int = 32 * MIB
    memory_bytes: int = 2048 * MIB
    pixels: int = 36_000_000
    side_ratio: int = 200
    images: int = 16
    tokens: int = 4096
    default_tokens: int = 512
    choices: int = 8
    inputs: int = 256
    input_characters: int = 1_000_000
    json_depth: int = 64
    json_values: int = 200_000
    schema_bytes: int = 65_536
    attention_bytes: int = 1024 * MIB
    header_seconds: float = 15
    body_seconds: float = 60
    write_seconds: float = 30
    request_seconds: float = 300
    fetch_seconds: float = 10
    shutdown_seconds: int = 120
    connections: int = 512
    line: int = 64
    lookups: int = 8
    pending: int = 4


@dataclass(frozen=True)
class Settings:
    """Who may ask, and what for.

    Args:
        api_keys: any of them opens the interface; without keys it is open.
        hosts: names that the Host header may have; None is any. Names stop web pages elsewhere from reaching a
            server on loopback under a name of their own.
        origins: web origins whose pages may call the interface.
        image_urls: whether pictures are fetched from http(s) addresses.
        temperature: where a request names none.
    """

    api_keys: tuple[str, ...] = ()
    hosts: tuple[str, ...] | None = None
    origins: tuple[str, ...] = ()
    image_urls: bool = False
    temperature: float = 0.0
    limits: Limits = field(default_factory=Limits)
