"""Drives a node through a client that openapi-python-client generated from docs/openapi.yaml.

Usage: drive.py PACKAGE-DIRECTORY CONTROL-SOCKET LAYER UPPER-DIRECTORY
"""

import sys

directory, control, layer, upper = sys.argv[1:]
sys.path.insert(0, directory)

import httpx  # noqa: E402  the client brings it
from ovbd_client import Client  # noqa: E402
from ovbd_client.api.default import (  # noqa: E402
    delete_disk,
    get_config,
    get_disk,
    get_disk_stats,
    get_image,
    get_live,
    get_ready,
    get_version,
    list_disks,
    list_events,
    list_images,
    list_snapshots,
    make_snapshot,
    patch_disk,
    put_disk,
    reload,
    resize_disk,
    restart_disk,
)
from ovbd_client.models import (  # noqa: E402
    DiskPatch,
    DiskSpec,
    Error,
    MakeSnapshotBody,
    ResizeDiskBody,
)

transport = httpx.HTTPTransport(uds=control)
client = Client(base_url="http://localhost/api/v1", httpx_args={"transport": transport})


def ask(operation, status, *arguments, **more):
    """Performs an operation, and returns the object that the client made of the answer."""
    answer = operation.sync_detailed(*arguments, client=client, **more)
    assert answer.status_code == status, (operation.__name__, answer)
    return answer.parsed


spec = DiskSpec.from_dict({
    "layers": [layer],
    "upper": {"dir": upper},
    "labels": {"team": "a b"},
    "limits": {"ops": {"size": 5000, "refill_time": 1000}, "bandwidth": None},
    "takeover": "never",
    "socket_mode": "0660",
})
ask(put_disk, 204, "a", body=spec, validate=True)
made = ask(put_disk, 201, "a", body=spec, if_none_match="*")
assert (made.id, made.state.value, made.generation) == ("a", "listening", 1), made
assert made.labels["team"] == "a b" and made.takeover.value == "never", made
assert made.limits.ops.size == 5000 and made.limits.bandwidth is None, made
again = ask(put_disk, 200, "a", body=spec)
assert again.socket == made.socket and again.created == made.created

changed = ask(patch_disk, 200, "a", body=DiskPatch.from_dict({"labels": {"team": None, "x": "y"}}), if_match='"1"')
assert changed.generation == 2 and changed.labels.to_dict() == {"x": "y"}, changed
refused = ask(patch_disk, 412, "a", body=DiskPatch.from_dict({"labels": {}}), if_match='"1"')
assert isinstance(refused, Error) and refused.code.value == "changed" and refused.causes == [], refused

grown = ask(resize_disk, 200, "a", body=ResizeDiskBody(bytes_=8 << 20))
assert grown.size_bytes == 8 << 20, grown
taken = ask(make_snapshot, 200, "a", body=MakeSnapshotBody(name="s", wait=True))
assert taken.sealed and taken.layers, taken
assert [snapshot.name for snapshot in ask(list_snapshots, 200, "a")] == ["s"]
fork = DiskSpec.from_dict({"from": {"disk": "a", "snapshot": "s"}})
assert ask(put_disk, 201, "b", body=fork).upper is None

page = ask(list_disks, 200, limit=1)
assert ([disk.id for disk in page.disks], page.next_) == (["a"], "a"), page
page = ask(list_disks, 200, limit=1, after=page.next_)
assert ([disk.id for disk in page.disks], page.next_) == (["b"], None), page
assert [disk.id for disk in ask(list_disks, 200, label=["x=y"]).disks] == ["a"]

stats = ask(get_disk_stats, 200, "a")
assert stats.requests["read"].ok == 0 and stats.size_bytes == 8 << 20, stats
images = ask(list_images, 200).images
assert len(images) == 2, images
image = ask(get_image, 200, made.image)
assert image.disks == ["a"] and image.layers[0].layer == layer, image
config = ask(get_config, 200)
assert [disk.id for disk in config.disks] == ["a", "b"] and config.damaged == [], config
assert config.disks[1].spec.layers == taken.layers, config
events = ask(list_events, 200, after=0, wait=0)
assert {event.event.value for event in events.events} >= {"added", "resized", "snapshot"}, events

assert ask(restart_disk, 200, "b").id == "b"
assert ask(reload, 202).disks >= 1
ask(get_live, 200)
assert ask(get_ready, 200).failed == []
assert ask(get_version, 200).version
missing = ask(get_disk, 404, "none")
assert missing.code.value == "not_found", missing
for name in ["a", "b"]:
    ask(delete_disk, 204, name, force=True)
print("done")
