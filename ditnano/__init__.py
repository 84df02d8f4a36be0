"""Design, distill, measure and ship tiny one-step diffusion transformers (arXiv 2502.14226).

`__init__.pyi` lists the names that other people's code relies on. Each is loaded from its module when it is first used,
so that `import ditnano` loads neither torch nor numpy.
"""
import lazy_loader

__version__ = "0.1.0"
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
