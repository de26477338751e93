"Whatever the arguments: a correct fit, or an error in our own words. `benchmarks/fuzz.py` tries thousands"
import sys
from pathlib import Path
sys.path.insert(0, str(Path(__file__).parents[1]/'benchmarks'))
import fuzz

def test_arguments():
    fuzz.fuzz(120)
    assert not fuzz.found, fuzz.found
    assert fuzz.counts['a correct run']>20 and fuzz.counts['a clear error']>100 and set(fuzz.counts)=={'a correct run','a clear error'}
