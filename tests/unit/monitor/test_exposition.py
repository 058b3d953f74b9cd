"""Many sandboxes' metrics as one text."""

from katapod.monitor.exposition import LINES_MAX, Families, label_text, merge, render

ONE = """\
# HELP kata_shim_threads Threads of the shim.
# TYPE kata_shim_threads gauge
kata_shim_threads 5
# HELP kata_guest_load Load.
# TYPE kata_guest_load gauge
kata_guest_load{item="load1"} 0.5
kata_guest_load{item="a b {x} 1"} 2
# TYPE h histogram
h_bucket{le="+Inf"} 1
h_sum 3
h_count{} 1
"""


def merged(*texts: tuple[str, str], prefixes: tuple[str, ...] = ()) -> str:
    families: Families = {}
    for name, text in texts:
        merge(families, text, label_text({"sandbox_id": name}), prefixes)
    return "".join(render(families))


def test_labels_are_added_and_families_stay_together() -> None:
    lines = merged(("a", ONE), ("b", ONE)).splitlines()
    assert lines[:4] == [
        "# HELP kata_shim_threads Threads of the shim.",
        "# TYPE kata_shim_threads gauge",
        'kata_shim_threads{sandbox_id="a"} 5',
        'kata_shim_threads{sandbox_id="b"} 5',
    ]
    assert 'kata_guest_load{sandbox_id="a",item="a b {x} 1"} 2' in lines
    assert lines.count("# TYPE h histogram") == 1
    assert lines[-3:] == [
        'h_bucket{sandbox_id="b",le="+Inf"} 1',
        'h_sum{sandbox_id="b"} 3',
        'h_count{sandbox_id="b"} 1',
    ]


def test_other_runtimes_names_get_the_shims_prefix() -> None:
    text = merged(("a", '# TYPE go_info gauge\ngo_info 1\nprocess_x{a="1"} 2\n'))
    assert text.splitlines() == [
        "# TYPE kata_shim_go_info gauge",
        'kata_shim_go_info{sandbox_id="a"} 1',
        'kata_shim_process_x{sandbox_id="a",a="1"} 2',
    ]


def test_families_are_chosen_by_prefix() -> None:
    assert "kata_guest_load" not in merged(("a", ONE), prefixes=("kata_shim", "h"))
    assert "h_sum" in merged(("a", ONE), prefixes=("kata_shim", "h"))
    assert merged(("a", ONE), prefixes=("nothing",)) == ""


def test_samples_without_a_head_and_no_text() -> None:
    assert merged(("a", "x 1"), ("b", "")) == 'x{sandbox_id="a"} 1\n'


def test_a_label_is_text() -> None:
    assert merged(('q"\\\n\\1', "x 1\n")) == 'x{sandbox_id="q\\"\\\\\\n\\\\1"} 1\n'


def test_one_help_and_one_type_a_name() -> None:
    """A guest that writes a HELP for each of 20,000 lines once cost seconds, and Prometheus the scrape."""
    lies = "".join(f"# HELP kata_guest_load number {number}\n" for number in range(9000))
    text = merged(("a", f"{lies}# TYPE kata_guest_load counter\n{lies}kata_guest_load 1\n"))
    assert text == (
        '# HELP kata_guest_load number 0\n# TYPE kata_guest_load counter\nkata_guest_load{sandbox_id="a"} 1\n'
    )


def test_the_number_of_lines_is_limited() -> None:
    text = merged(("a", "x 1\n" * (LINES_MAX + 5)), ("b", "x 2\n" * LINES_MAX), ("c", "x 3\n" * (LINES_MAX + 1) + "y"))
    assert text.splitlines() == [
        f'x{{sandbox_id="{name}"}} {n + 1}' for n, name in enumerate("abc") for _ in range(LINES_MAX)
    ]


def test_what_most_say_of_a_family_stands() -> None:
    honest, liar = "# TYPE x gauge\nx 1\n", "# HELP x Buy.\n# TYPE x counter\nx 1\n"
    assert merged(("a", liar), ("b", honest), ("c", honest)).startswith('# TYPE x gauge\nx{sandbox_id="a"} 1\n')
