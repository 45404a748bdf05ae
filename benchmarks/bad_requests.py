"""What every bad request of the tests gets from a real server: status, code and message.

    python benchmarks/bad_requests.py [http://127.0.0.1:8000] [--api-key KEY]

Without a URL it starts `evener serve` itself.

Exits 1 when any answer is not the expected one, or when a good request no longer works afterwards.
"""

import argparse
import sys
from pathlib import Path

import httpx

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "serve"))

from bad_requests import Server, bad_requests
from common import Target, evener, markdown, save


def main() -> int:
    """Run the list; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("url", nargs="?", help="of a running server")
    parser.add_argument("--api-key", default="")
    parser.add_argument("--max-body-bytes", type=int, default=8 * 2**20, help="the server's limit")
    args = parser.parse_args()
    headers = {"authorization": f"Bearer {args.api_key}"} if args.api_key else {}
    target = Target("given", url=args.url) if args.url else evener("server", "--devices", "cpu:0")
    with target.serving() as url, httpx.Client(base_url=url, headers=headers, timeout=60) as http:
        server = describe(http, args.max_body_bytes)
        rows = []
        for bad in bad_requests(server):
            sent = {} if bad.content_type is None else {"content-type": bad.content_type}
            response = http.request(bad.method, bad.path, content=bad.body, headers=sent)
            error = response.json().get("error", {})
            expected = (response.status_code, error.get("code"), error.get("param")) == bad[3:6]
            rows.append(
                {
                    "request": bad.name,
                    "path": bad.path,
                    "status": response.status_code,
                    "code": error.get("code"),
                    "message": error.get("message"),
                    "as_expected": expected,
                }
            )
        good = http.post("/v1/completions", json={"prompt": "Hello", "max_tokens": 4})
    cells = [
        [k, row["request"], row["path"], row["status"], row["code"], _cell(row["message"]), row["as_expected"]]
        for k, row in enumerate(rows, 1)
    ]
    print(markdown(["#", "request", "path", "status", "code", "message", "as expected"], cells))
    wrong = sum(not row["as_expected"] for row in rows)
    print(f"\n{len(rows)} bad requests, {wrong} answered unexpectedly; a good one afterwards: {good.status_code}")
    save("bad_requests", {"rows": rows, "unexpected": wrong, "good_after": good.status_code})
    return int(wrong > 0 or good.status_code != 200)


def _cell(message: object) -> str:
    return str(message).replace("|", "\\|").replace("\n", " ")[:160]


def describe(http: httpx.Client, max_body_bytes: int) -> Server:
    """What the server tells about itself: its name and limits are in its answers and refusals."""
    model = http.get("/v1/models").raise_for_status().json()["data"][0]
    beyond = http.post("/detokenize", json={"tokens": [10**12]}).json()["error"]["message"]
    many = http.post("/v1/completions", json={"prompt": "hi", "logprobs": 10**6}).json()["error"]["message"]
    vocab = int(beyond.rpartition(" ")[2]) + 1
    top = int(many.rpartition(" ")[2])
    return Server(model["id"], vocab, model["max_model_len"], top, max_body_bytes)


if __name__ == "__main__":
    sys.exit(main())
