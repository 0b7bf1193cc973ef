"""The paper and the studies: suites, cells, scheduling, tables, figures and the demo."""
