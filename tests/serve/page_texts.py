"""Answers for the chat page: one with everything in it, one that attacks."""

RICH = r"""## A heading

A line with $a^2 + b^2$, `code` and [a link](https://example.org/).

$$ \begin{pmatrix} a & b \\ c & d \end{pmatrix} \sum_{k=1}^{n} k = \frac{n(n+1)}{2} \qquad \int_0^1 x\,dx = \frac12 $$

```python
def a_function(with_parameters: int, and_more: str = "a rather long text that needs room") -> dict[str, int]:
    return {"answer": 42}  # a comment
```

| first column | second column | third column | fourth column |
|---|--:|---|---|
| some text | 1234567890 | unbreakable_but_very_long_identifier | end |

> A quotation

1. one
   - nested
"""

HOSTILE = r"""
<img src=x onerror="window.ran=1"> <script>window.ran=2</script> <svg onload="window.ran=3"><a href="javascript:ran=4">
<iframe srcdoc="<script>parent.ran=5</script>"></iframe><style>body{display:none}</style>
<math><mtext><table><mglyph><style><!--</style><img title="--&gt;&lt;img src=1 onerror=window.ran=6&gt;">

[a](javascript:window.ran=7) [b](JaVaScRiPt&#58;window.ran=8) [c](data:text/html,<script>opener.ran=9</script>)
[d](vbscript:x) ![e](x"onerror="window.ran=10) ![f](http://tracker.invalid/p.png) [g](/relative)
<javascript:window.ran=11>

[h]: javascript:window.ran=12
[h] [i](https://example.org/ "x\" onmouseover=\"window.ran=13")

$\href{javascript:window.ran=14}{x}$ $\htmlData{onclick=window.ran=15}{x}$ $\style{position:fixed;inset:0}{x}$
$$\begin{align} x \label{prompt} \end{align}$$
$\includegraphics{http://tracker.invalid/p.png}$ $\def\a{\a\a}\a$ $\class{skip}{x}$

```"><img src=x onerror=window.ran=16>
</code></pre><script>window.ran=17</script>
```

```html
<script>window.ran=18</script><img src=x onerror=window.ran=19>
```
"""
