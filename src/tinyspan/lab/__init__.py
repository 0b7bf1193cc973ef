"""The paper's experiments and other studies: suites, cells, scheduling, tables, figures and the demo."""
