import json,base64,sys
n=sys.argv[1]
nb=json.load(open(f'/work/wt-new/book/{n}.ipynb')); k=0
for c in nb['cells']:
    for o in c.get('outputs',[]):
        d=o.get('data',{})
        if 'image/png' in d:
            k+=1; open(f'/tmp/f_{n}_{k}.png','wb').write(base64.b64decode(d['image/png']))
        elif 'text/markdown' in d: print(''.join(d['text/markdown'])); print()
        elif 'text' in o: print(''.join(o['text']))
        elif 'text/plain' in d and 'svg' not in ''.join(d['text/plain'])[:10] and 'details' not in ''.join(d['text/plain'])[:20]: print(''.join(d['text/plain'])[:600]); print()
