from stsr_core.events import about, line


def test_an_event_is_one_line_of_pairs_and_says_what_it_is_about():
    with about(run="r1", product="rain"):
        with about(version="v2"):
            assert line("published", item="s3://b/v2.json", seconds=1.23456) == (
                "published run=r1 product=rain version=v2 item=s3://b/v2.json seconds=1.235"
            )
        assert (
            line("gate", found="1 quantum", name="", left_out=None)
            == 'gate run=r1 product=rain found="1 quantum" name=""'
        )
    assert line("nothing") == "nothing"


def test_values_with_quotes_signs_or_new_lines_stay_on_one_line():
    assert line("failed", why='said "no"\nand a=b') == r'failed why="said \"no\"\nand a=b"'
