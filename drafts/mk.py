"""Build book/NAME.ipynb from NAME.txt: cells begin with a line '%% md' or '%% code [tag ...] [|| what its fold says] [| alt text of its figure]'."""
import json, re, sys
from pathlib import Path
src=Path(sys.argv[1]); out=Path(sys.argv[2])
SETUP=[c for c in json.loads(Path("/work/main/book/index.ipynb").read_text())["cells"] if "remove-cell" in c["metadata"].get("tags",[])][0]
cells=[]
for part in re.split(r"^%% ", src.read_text(), flags=re.M)[1:]:
    head,_,body=part.partition("\n"); body=body.strip("\n")
    head,_,fold=head.partition("||"); fold,_,alt=fold.partition("|") if _ else ("","",head.partition("|")[2])
    kind,*tags=head.partition("|")[0].split()
    if kind=="code" and ("states(" in body or "check(" in body) and "import" not in body: tags.append("nbval-check-output")
    meta={}
    if tags: meta["tags"]=tags
    if fold.strip(): meta["mystnb"]={"code_prompt_show":fold.strip()}
    if alt.strip(): meta["mystnb"]=meta.get("mystnb",{})|{"image":{"alt":alt.strip()}}
    lines=body.splitlines(keepends=True)
    cell={"cell_type":"markdown" if kind=="md" else "code","id":f"c{len(cells)}","metadata":meta,"source":lines}
    if kind!="md": cell|={"execution_count":None,"outputs":[]}
    cells.append(cell)
    if len(cells)==1: cells.append({**SETUP,"id":"setup","outputs":[],"execution_count":None})
out.write_text(json.dumps({"cells":cells,"metadata":{"kernelspec":{"display_name":"Python 3","language":"python","name":"python3"},"language_info":{"file_extension":".py","name":"python","pygments_lexer":"ipython3"}},"nbformat":4,"nbformat_minor":5},indent=1,ensure_ascii=False)+"\n")
