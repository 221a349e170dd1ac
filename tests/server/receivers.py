"""What gets notifications on this machine: a webhook, a mail server, and a proxy that answers for Slack, Teams and
PagerDuty.

The proxy takes requests for their real addresses and has a certificate for these, which only whoever is told to trusts.
"""

from __future__ import annotations

import json
import socketserver
import ssl
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from email import message_from_string
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

HOSTS = ("hooks.slack.com", "prod-1.westus.logic.azure.com", "events.pagerduty.com")
SLACK = f"https://{HOSTS[0]}/services/T{'A' * 8}/B{'B' * 8}/{'c' * 24}"
TEAMS = (
    f"https://{HOSTS[1]}:443/workflows/abcd1234/triggers/manual/paths/invoke?api-version=2016-06-01&"
    "sp=%2Ftriggers%2Fmanual%2Frun&sv=1.0&sig=SIGNATURE"
)
PAGERDUTY = f"pagerduty://{'i' * 32}@{'A' * 20}"


@dataclass
class Receivers:
    """The addresses, and what arrived there: host (or `webhook`, `mail`) -> texts."""

    webhook: str = ""
    mail: str = ""
    proxy: str = ""
    certificate: Path = Path()
    arrived: dict[str, list[str]] = field(default_factory=dict)

    @property
    def environment(self) -> dict[str, str]:
        """What makes a process reach the proxy instead of the services."""
        return {"HTTPS_PROXY": self.proxy, "NO_PROXY": "127.0.0.1", "REQUESTS_CA_BUNDLE": str(self.certificate)}

    def add(self, place: str, text: str) -> None:
        self.arrived.setdefault(place, []).append(text)


def _certificate(folder: Path) -> Path:
    """A file with a new key and a certificate of it for `HOSTS`."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, HOSTS[0])])
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(host) for host in HOSTS]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    path = folder / "certificate.pem"
    path.write_bytes(private + made.public_bytes(serialization.Encoding.PEM))
    return path


@contextmanager
def receiving(folder: Path) -> Iterator[Receivers]:
    """Within the block, the receivers listen."""
    found = Receivers(certificate=_certificate(folder))
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(found.certificate)

    class Webhook(BaseHTTPRequestHandler):
        place = "webhook"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"])).decode()
            found.add(self.place, body)
            self.send_response(202 if "pagerduty" in self.place else 200)
            self.end_headers()
            self.wfile.write(b"ok")

        def do_CONNECT(self) -> None:
            host = self.path.partition(":")[0]
            if host not in HOSTS:
                self.send_error(502)
                return
            self.send_response(200)
            self.end_headers()
            self.wfile.flush()
            inner = type("Inner", (Webhook,), {"place": host})
            with tls.wrap_socket(self.connection, server_side=True) as secure:
                inner(secure, self.client_address, self.server)
            self.close_connection = True

        def log_message(self, format: str, *args: Any) -> None:
            pass

    class Mail(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            self.wfile.write(b"220 here\r\n")
            while line := self.rfile.readline().strip().upper():
                if line.startswith(b"DATA"):
                    self.wfile.write(b"354 go on\r\n")
                    lines = iter(self.rfile.readline, b".\r\n")
                    found.add("mail", b"".join(lines).decode())
                self.wfile.write(b"221 bye\r\n" if line.startswith(b"QUIT") else b"250 well\r\n")
                if line.startswith(b"QUIT"):
                    return

    with ExitStack() as stack:

        def start(server: socketserver.TCPServer) -> str:
            stack.enter_context(server)
            threading.Thread(target=server.serve_forever, daemon=True).start()
            stack.callback(server.shutdown)
            return f"127.0.0.1:{server.server_address[1]}"

        http = start(ThreadingHTTPServer(("127.0.0.1", 0), Webhook))
        mail = start(socketserver.ThreadingTCPServer(("127.0.0.1", 0), Mail))
        found.webhook, found.proxy = f"http://{http}/hook", f"http://{http}"
        found.mail = f"mailto://{mail}/?from=resmaster@example.org&to=team@example.org"
        yield found


def text_of(place: str, message: str) -> str:
    """What a reader of a message sees, as far as it tells of the run."""
    if place != "mail":
        return json.dumps(json.loads(message), ensure_ascii=False)
    mail = message_from_string(message)
    parts = [part.get_payload(decode=True) for part in mail.walk() if not part.is_multipart()]
    return f"{mail['Subject']}\n" + "\n".join(part.decode() for part in parts if isinstance(part, bytes))
