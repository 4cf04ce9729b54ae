"Say at the end which tests were skipped, one line for each reason"
from collections import defaultdict

def pytest_terminal_summary(terminalreporter):
    skipped = defaultdict(set)
    for report in terminalreporter.stats.get('skipped', []):
        reason = report.longrepr[2]
        skipped[reason].add(report.nodeid.split('::')[-1].split('[')[0])
    for reason,tests in skipped.items(): terminalreporter.write_line(f'{reason} ({", ".join(sorted(tests))})')
