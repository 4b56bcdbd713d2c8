from opdlab.lab.records import load
from opdlab.claims import Metric
from opdlab.stats import mean_interval
import numpy as np
arms = ("sft", "opd", "opd_full", "rlvr", "sft_matched", "random_signs")
r=load("tiny",arms)
def iv(s): return f"{mean_interval(s.dropna()):.3f}"
sp,ru,no=(Metric(c).values(r) for c in ("sparsity","sparsity_ruler","relative_norm"))
for a in arms: print(a, "norm",f"{100*no[a].mean():.3f}", "sp",iv(sp[a]),"gap",iv(sp[a]-ru[a]))
for c in ("low_overlap_a30","principal_overlap_a30"):
    v,u=Metric(c).values(r),Metric(c+"_ruler").values(r)
    print(c,{a:iv(v[a]-u[a]) for a in arms},{a:round(v[a].mean(),3) for a in arms})
from opdlab.measuring.where import of_seeds
import pandas as pd
st=of_seeds(r.runs,{n:getattr(r,n) for n in ("matrices","trajectory","history")})
for a in arms: print(a, pd.DataFrame(st[a])[["coherence","growth","step_size","clipped"]].round(3).to_dict("list"))
for c in ("angle_left_mean","angle_left_mean_matched","nss","nss_matched"):
    v=Metric(c,log=True).values(r); print(c,{a:round(float(np.exp(v[a].mean())),4) for a in arms}, "opd-rlvr",iv(v.opd-v.rlvr),"sft-opd",iv(v.sft-v.opd))
for view in ("","_bf16","_locked"):
    e,l=(Metric("stable_rank"+view,progress=p,block="attention",log=True).values(r) for p in (.2,1.))
    print(view,{a:(round(float(np.exp(e[a].mean())),2),round(float(np.exp(l[a].mean())),2)) for a in arms}, "fall opd",iv(e.opd-l.opd),"fall rlvr",iv(e.rlvr-l.rlvr),"sftrise",iv(l.sft-e.sft))
for view in ("","_null","_bf16","_locked"):
    v=Metric("sim_right_K16"+view,progress=.2,block="attention").values(r); print("sim"+view,{a:iv(v[a]) for a in arms})
k=Metric("kl_teacher").values(r); k0=Metric("kl_teacher",progress=0.0).values(r)
print({a:iv(k0[a]-k[a]) for a in arms if a!="sft"})
for m in ("sampled","greedy"):
    s=Metric(m).values(r); s0=Metric(m,progress=0.).values(r); print(m,{a:iv(s[a]-s0[a]) for a in arms if a!="sft"}, s.mean().round(3).to_dict())
