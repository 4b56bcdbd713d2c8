import pandas as pd, opdlab
from opdlab.lab.laboratory import Laboratory, default_root
from opdlab.lab.scales import *
print(opdlab.__file__)
from pathlib import Path
from dataclasses import replace
root=Path("/work/main")
class L(Laboratory): pass
# regime: models folder 'regime', records 'regime'
t=replace(TINY, name="regime", models=replace(TINY.models, folder="regime"))
lab=Laboratory(t, root)
idx=pd.read_csv(lab.records/"runs.csv", dtype=str)
bad=[(r.arm,r.seed) for r in idx.itertuples() if lab.experiment(r.arm,int(r.seed)).key!=r.key]
print("regime", len(idx), bad)
t=replace(TINY_LEARNING, name="tiny", models=replace(TINY_LEARNING.models, folder="tiny"))
lab=Laboratory(t, root)
idx=pd.read_csv(lab.records/"runs.csv", dtype=str)
idx=idx[idx.arm.isin(t.policy.arms)]
bad=[(r.arm,r.seed) for r in idx.itertuples() if lab.experiment(r.arm,int(r.seed)).key!=r.key]
print("learning", len(idx), bad)
