"""What GetMetrics answers: names, items and units of Kata's metrics."""

from katapod.agent.metrics import MEMINFO, disk_rows, filesystems, meminfo_rows, render_family, status_rows


def test_meminfo_in_bytes_under_upstreams_names() -> None:
    text = "MemTotal:  100 kB\nActive(anon): 3 kB\nHugePages_Total:  7\nDirectMap4k: 1 kB\nUnknown: 5 kB\n"
    found = {dict(labels)["item"]: value for labels, value in meminfo_rows(text)}
    assert len(found) == len(MEMINFO) == 58
    assert (found["mem_total"], found["active_anon"], found["hugepages_total"]) == (102400, 3072, 7)
    assert (found["direct_map_4k"], found["cma_free"]) == (1024, 0)


def test_status_in_kib() -> None:
    text = "VmRSS:\t  5 kB\nName:\tx\nvoluntary_ctxt_switches:\t9\n"
    found = {dict(labels)["item"]: value for labels, value in status_rows(text)}
    assert (found["vmrss"], found["voluntary_ctxt_switches"], found["vmpeak"]) == (5, 9, 0)
    assert "vmpmd" not in found


def test_disks_of_older_kernels_have_fewer_columns() -> None:
    new = disk_rows(" 254 0 vda " + " ".join(map(str, range(17))))
    assert len(new) == 17
    assert dict(new[2][0]) == {"disk": "vda", "item": "sectors_read"}
    assert new[2][1] == 2
    assert dict(new[16][0])["item"] == "time_flushing"
    assert len(disk_rows(" 254 0 vda " + " ".join("0" * 11))) == 11


def test_file_systems_on_disks_one_for_each_device() -> None:
    text = (
        "/dev/vda / ext4 rw,relatime 0 0\n/dev/vda /again ext4 rw 0 0\n/dev/vdb /ro ext4 ro 0 0\n"
        "tmpfs /tmp tmpfs rw 0 0\noverlay /a\\040b overlay rw,x 0 0\noverlay /c overlay rw 0 0\n"
    )
    assert filesystems(text) == [("/", "/dev/vda"), ("/a b", "overlay"), ("/c", "overlay")]


def test_a_family() -> None:
    rows = [((("a", 'b"\\\n'),), 1.5), ((), 2.0)]
    assert render_family("x", "gauge", "X.", rows) == ('# HELP x X.\n# TYPE x gauge\nx{a="b\\"\\\\\\n"} 1.5\nx 2\n')
    assert render_family("x", "gauge", "X.", []) == ""
