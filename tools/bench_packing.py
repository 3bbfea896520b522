"""Benchmark data: see below (draft)."""
from __future__ import annotations
import sys
import numpy as np
from anyres_vlm.geometry import Size, Tiling, plan_tiles

def visual(rng, count, lows, highs):
    """Tokens and tiles of random images, from a pool of 2,000 sizes."""
    pool = min(2000, count)
    widths = rng.integers(lows[0], highs[0], pool); heights = rng.integers(lows[1], highs[1], pool)
    tiling = Tiling()
    plans = [plan_tiles(Size(height=int(h), width=int(w)), tiling) for h, w in zip(heights, widths)]
    pick = rng.integers(0, pool, count)
    return (np.array([p.total_tokens for p in plans])[pick], np.array([p.num_tiles for p in plans])[pick])

def stage2(n, seed, shares=(0.08,0.36,0.24,0.11,0.21)):
    rng = np.random.default_rng(seed)
    kind = rng.choice(5, n, p=shares)
    tokens = np.zeros(n, np.int64); tiles = np.zeros(n, np.int64)
    def put(k, vis, text):
        where = np.flatnonzero(kind==k)
        m = len(where)
        t = np.clip(np.rint(text(m)),8,None).astype(np.int64)
        if vis is not None:
            v, c = vis(m); t = t+v; tiles[where]=c
        tokens[where]=np.minimum(t,4096)
    put(0, None, lambda m: rng.lognormal(6.0,0.9,m))
    def natural(m):
        sizes=[(640,480)]*40+[(480,640)]*15+[(640,427)]*12+[(500,375)]*10+[(427,640)]*6+[(375,500)]*5+[(612,612)]*2+[(640,360)]*3
        rest=[(int(a),int(b)) for a,b in rng.integers(200,1100,(400,2))]
        allp=[plan_tiles(Size(height=h,width=w),Tiling()) for w,h in sizes+rest]
        p=np.r_[np.full(len(sizes),.8/len(sizes)),np.full(len(rest),.2/len(rest))]
        i=rng.choice(len(allp),m,p=p)
        return np.array([q.total_tokens for q in allp])[i],np.array([q.num_tiles for q in allp])[i]
    put(1, natural, lambda m: rng.lognormal(4.7,0.7,m))
    put(2, lambda m: visual(rng,m,(900,1100),(1700,2200)), lambda m: rng.lognormal(5.25,0.8,m))
    put(3, lambda m: visual(rng,m,(330,250),(1200,900)), lambda m: rng.lognormal(4.6,0.6,m))
    put(4, natural, lambda m: rng.lognormal(6.3,0.7,m))
    return tokens, tiles

def captions(n, seed):
    rng = np.random.default_rng(seed)
    v,c = visual(rng,n,(200,200),(1100,1100))
    return v+np.clip(np.rint(rng.lognormal(3.4,0.4,n)),8,200).astype(np.int64), c
if __name__=="__main__":
    t,c=stage2(100000,0); print(t.mean(),c.mean(),(c==0).mean(),t.min(),t.max())
    t,c=captions(100000,0); print(t.mean(),c.mean(),t.min(),t.max())
