"""Experiments, benchmarks and the course; run each with `python -m minids.lab.NAME`.

    bench    minids beside transformers, experts beside dense, sparse attention, drafts, in tables;
             its parts are bench_setup, bench_transformers, bench_dense, bench_sparse,
             bench_speculative and timing
    claims   the papers' claims about balance and FP8, over several seeds
    recall   a task that depends on distant tokens: which selection finds them?
    course   the notebooks without answers, or as nbgrader assignments
    flags    the page of every program's flags
    lesson   for notebooks: tables and self-checking exercises; checker runs learners' code safely
"""
