"""A server that webhooks are sent to, over HTTP or TLS, which answers as a test wants."""

import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

Answer = Callable[[socket.socket], None]


@dataclass
class Receiver:
    """`requests` are (head, body) as they came; `names` what TLS clients asked for."""

    port: int
    requests: list[tuple[str, str]] = field(default_factory=list)
    names: list[str | None] = field(default_factory=list)
    connections: int = 0

    def headers(self, index: int = -1) -> dict[str, str]:
        lines = self.requests[index][0].split("\r\n")[1:]
        return {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}


def status(code: int, *lines: str) -> Answer:
    """An empty answer."""
    head = "\r\n".join([f"HTTP/1.1 {code} X", "Content-Length: 0", *lines, "", ""])
    return lambda connection: connection.sendall(head.encode())


@contextmanager
def receiving(*answers: Answer, tls: ssl.SSLContext | None = None) -> Iterator[Receiver]:
    """Answers one after the other; the last one is for all that follow."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        receiver = Receiver(int(listener.getsockname()[1]))
        if tls is not None:
            tls.sni_callback = lambda _socket, name, _context: receiver.names.append(name)
        left = list(answers)

        def serve() -> None:
            while True:
                try:
                    accepted, _ = listener.accept()
                except OSError:
                    return
                receiver.connections += 1
                answer = left.pop(0) if len(left) > 1 else left[0]
                threading.Thread(target=_converse, args=(accepted, tls, receiver, answer), daemon=True).start()

        threading.Thread(target=serve, daemon=True).start()
        yield receiver
        listener.shutdown(socket.SHUT_RDWR)


def _converse(accepted: socket.socket, tls: ssl.SSLContext | None, receiver: Receiver, answer: Answer) -> None:
    try:
        with accepted, tls.wrap_socket(accepted, server_side=True) if tls else accepted as connection:
            connection.settimeout(10)
            data = b""
            while b"\r\n\r\n" not in data:
                data += connection.recv(65536)
            head, _, body = data.partition(b"\r\n\r\n")
            length = int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0])
            while len(body) < length:
                body += connection.recv(65536)
            receiver.requests.append((head.decode(), body.decode()))
            answer(connection)
    except OSError:  # the client went away, or did not like the certificate
        return


def certificate(folder: Path, *names: str) -> tuple[ssl.SSLContext, Path]:
    """A server's context with a certificate for `names`, and the file that says it is to be trusted."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "tests")])
    alternatives = [x509.IPAddress(ip_address(name)) if name[0].isdigit() else x509.DNSName(name) for name in names]
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    trusted, private = folder / "certificate.pem", folder / "key.pem"
    trusted.write_bytes(made.public_bytes(serialization.Encoding.PEM))
    private.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(trusted, private)
    return context, trusted
