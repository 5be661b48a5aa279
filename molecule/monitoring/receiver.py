"""Receives alerts: appends time, path and body of each to a file, and refuses all while /run/refuse is there."""

import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path


class Receiver(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        refused = Path("/run/refuse").exists()
        if not refused:
            with Path("/root/received").open("ab") as file:
                file.write(f"{time.time():.3f} {self.path} ".encode() + body + b"\n")
        self.send_response(400 if refused else 200)
        self.end_headers()


HTTPServer(("127.0.0.1", 9999), Receiver).serve_forever()
