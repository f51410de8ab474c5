"""The sections of docs/performance.md, one module per kind of result."""
