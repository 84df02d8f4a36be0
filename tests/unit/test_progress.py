"How far trainings are: lines of one, and one line for several in child processes."
import io
import re

import pytest

from ditnano.lab.processes import RunsInProgress, run_progress
from ditnano.state import Progress


def line(images, **more): return {'images': images, 'of': 1000, 'loss': 0.5, 'images_per_s': 1234.5} | more


class Screen(io.StringIO):
    def isatty(self): return True


def shown(text):
    "What a screen holds after this text: carriage return, and erasing to the end of a line."
    rows = [row.split('\r')[-1].split('\x1b[K')[-1] for row in text.split('\n')]
    return [r for r in rows if r]


def test_lines_now_and_then_and_at_the_end():
    now, lines = [0.], []
    progress = Progress('teacher', lines.append, every=60, clock=lambda: now[0])
    for now[0], images in ((10, 100), (61, 200), (70, 300), (80, 1000)): progress(line(images))
    progress.close()
    assert [re.match(r'teacher: ([\d,]+) of 1,000 images, loss 0.5, 1,23\d images/s$', l)[1] for l in lines] == [
        '200', '1,000']


def test_without_a_screen_nothing_is_lost(capsys):
    progress = Progress('train', every=0)
    for images in (100, 1000): progress(line(images))
    progress.close()
    out, err = capsys.readouterr()
    assert out == '' and err.count('\n') == 2 and '\r' not in err


@pytest.mark.parametrize('text, expected', [
    (None, 'begins'), ('', 'begins'), ('{"images": 43', 'begins'), ('not json\n', 'begins'),
    ('{"images": 430, "of": 1000, "images_per_s": 1234.5}\n', '43%, 1.23e+03 images/s'),
    ('{"images": 430, "of": 1000, "images_per_s": 123.4}\n{"images": 44', '43%, 123 images/s'),
    ('{"images": 1000, "of": 1000, "images_per_s": 1.0}\n', 'is evaluated')])
def test_how_far_a_run_is(tmp_path, text, expected):
    if text is not None: (tmp_path/'history.jsonl').write_text(text)
    assert run_progress(tmp_path) == expected


def test_on_a_screen_lines_stay_whole(tmp_path):
    screen = Screen()
    progress = RunsInProgress(lambda text: print(text, file=screen), stream=screen)
    with progress, progress.running(tmp_path/'a', 'A'), progress.running(tmp_path/'b', 'B'):
        progress.show()
        assert shown(screen.getvalue()) == ['A begins; B begins']
        progress.log('1 of 2: done')
        progress.show()
        assert shown(screen.getvalue()) == ['1 of 2: done', 'A begins; B begins']
    assert shown(screen.getvalue()) == ['1 of 2: done']


def test_elsewhere_it_is_logged(tmp_path):
    lines = []
    progress = RunsInProgress(lines.append, stream=io.StringIO())
    progress.show()
    with progress.running(tmp_path/'a', 'A'): progress.show()
    progress.log('1 of 1: done')
    assert lines == ['in progress: A begins', '1 of 1: done']
