"""A local Hub server in memory, with the part of the upload API that publishing a model needs."""

import base64
import json
import re
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread


class Hub:
    """Repositories in memory, served over HTTP. Use as a context manager.

    Args:
        failures: regular expressions of paths, and how often a request to each fails with status 503 before it works.
    """

    def __init__(self, failures: dict[str, int] | None = None):
        self.repos, self.tags, self.blobs, self.commits, self.calls = {}, {}, {}, [], []  # tags: name to commit
        self.failures = dict(failures or {})

    def __enter__(self):
        handler = type("Handler", (HubHandler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()

    def fails(self, path: str) -> bool:
        for pattern, left in self.failures.items():
            if left and re.search(pattern, path):
                self.failures[pattern] -= 1
                return True
        return False


class HubHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_):
        pass

    def answer(self, status: int, body=b"", **headers):
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), "X-Request-Id": "1", **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def missing_repo(self):
        self.answer(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")

    def handle_any(self):
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = self.path.split("?")[0]
        self.hub.calls.append(f"{self.command} {path}")
        if self.hub.fails(path):
            return self.answer(503, {"error": "try again"})
        for pattern, method in ROUTES:
            if found := re.fullmatch(pattern, f"{self.command} {path}"):
                return method(self, *found.groups())
        return self.answer(404, {"error": f"no route for {self.command} {path}"})

    do_GET = do_POST = do_PUT = do_HEAD = handle_any

    def create(self):
        asked = json.loads(self.body)
        name = "/".join(part for part in (asked.get("organization"), asked["name"]) if part)
        if name in self.hub.repos:
            return self.answer(409, {"error": "exists", "url": f"{self.hub.url}/{name}"})
        self.hub.repos[name] = {}
        return self.answer(200, {"url": f"{self.hub.url}/{name}", "id": name})

    def info(self, repo):
        if repo not in self.hub.repos:
            return self.missing_repo()
        siblings = [{"rfilename": name} for name in self.hub.repos[repo]]
        return self.answer(200, {"id": repo, "sha": "0" * 40, "siblings": siblings, "tags": [], "private": False})

    def resolve(self, repo, revision, name):
        if repo not in self.hub.repos:
            return self.missing_repo()
        if name not in self.hub.repos[repo]:
            return self.answer(404, {"error": "Entry not found"}, X_Error_Code="EntryNotFound")
        return self.answer(200, self.hub.repos[repo][name], ETag='"1"', X_Repo_Commit="0" * 40)

    def validate(self):
        return self.answer(200, {"errors": [], "warnings": []})

    def preupload(self, repo):
        modes = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                "shouldIgnore": False,
            }
            for file in json.loads(self.body)["files"]
        ]
        return self.answer(200, {"files": modes})

    def batch(self, repo):
        objects = [
            {
                "oid": each["oid"],
                "size": each["size"],
                "actions": {"upload": {"href": f"{self.hub.url}/lfs/{each['oid']}"}},
            }
            for each in json.loads(self.body)["objects"]
        ]
        return self.answer(200, {"transfer": "basic", "objects": objects})

    def store(self, oid):
        self.hub.blobs[oid] = self.body
        return self.answer(200)

    def commit(self, repo):
        header, *operations = [json.loads(line) for line in self.body.splitlines()]
        files = self.hub.repos[repo]
        names = []
        for operation in operations:
            value = operation["value"]
            if operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                files[value["path"]] = self.hub.blobs[value["oid"]]
            elif operation["key"] == "deletedFile":
                del files[value["path"]]
            names.append(value["path"])
        self.hub.commits.append((header["value"]["summary"], sorted(names)))
        oid = f"{len(self.hub.commits):040d}"
        return self.answer(200, {"commitUrl": f"{self.hub.url}/{repo}/commit/{oid}", "commitOid": oid})

    def tag(self, repo, revision):
        name = json.loads(self.body)["tag"]
        if name in self.hub.tags.setdefault(repo, {}):
            return self.answer(409, {"error": "exists"})
        self.hub.tags[repo][name] = revision
        return self.answer(200)

    def refs(self, repo):
        tags = [
            {"name": name, "ref": f"refs/tags/{name}", "targetCommit": commit}
            for name, commit in self.hub.tags.get(repo, {}).items()
        ]
        return self.answer(200, {"tags": tags, "branches": [], "converts": []})

    def tree(self, repo):
        files = self.hub.repos[repo].items()
        return self.answer(
            200, [{"type": "file", "path": name, "size": len(data), "oid": "1"} for name, data in files]
        )


ROUTES = [
    (r"POST /api/repos/create", HubHandler.create),
    (r"POST /api/validate-yaml", HubHandler.validate),
    (r"GET /api/models/([^/]+/[^/]+)(?:/revision/main)?", HubHandler.info),
    (r"POST /api/models/([^/]+/[^/]+)/preupload/main", HubHandler.preupload),
    (r"POST /api/models/([^/]+/[^/]+)/commit/main", HubHandler.commit),
    (r"POST /api/models/([^/]+/[^/]+)/tag/(.+)", HubHandler.tag),
    (r"GET /api/models/([^/]+/[^/]+)/refs", HubHandler.refs),
    (r"GET /api/models/([^/]+/[^/]+)/tree/[^/]+", HubHandler.tree),
    (r"POST /([^/]+/[^/]+)\.git/info/lfs/objects/batch", HubHandler.batch),
    (r"PUT /lfs/(\w+)", HubHandler.store),
    (r"(?:GET|HEAD) /([^/]+/[^/]+)/resolve/([^/]+)/(.+)", HubHandler.resolve),
]
