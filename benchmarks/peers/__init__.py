"""The parts of ``benchmarks/quantization.py``: models, tools and runtimes to compare with.

    install.py    one Python environment per peer, with pinned versions
    models.py     the models of the table, each written once as a case folder
    cases.py      the case folder: fp32 model, samples, what it is judged by
    tools.py      the rows of the table: who quantizes, in which environment, who runs it
    quantize.py   one process: one tool quantizes one case, CPU time and peak memory
    by_*.py       how each tool is called
    engines.py    a file in its runtime, one thread
    worker.py     one process: one file, told to run one block of inferences in turn
    metrics.py    task metric, agreement, SQNR
    profile.py    where ONNX Runtime's time goes

quantize, engines, worker and by_* run in the peers' environments, where edgec is not
installed: they import nothing of it at the top.
"""
