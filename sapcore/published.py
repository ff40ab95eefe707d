"""Numbers that the paper or its authors state in public, each with its source; none is recalled or read off a plot."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Published:
    """One published accuracy or difference of accuracies, as a fraction."""

    figure: str
    series: str
    eps: float
    value: float
    source: str
    minus: str = ""
    """For a difference: the series that is subtracted."""


PUBLISHED = (
    *(
        point
        for figure in ("fig1b", "fig3")
        for point in (
            Published(figure, "SAP-100", 0, 0.83, "the authors' entry in RobustML"),
            Published(figure, "SAP-100", 4, 0.51, "the authors' entry in RobustML"),
            Published(figure, "SAP-100", 1, 0.122, "the paper's text, Sec. 4.1", minus="dense"),
        )
    ),
    Published("fig3", "ADV", 0, 0.75, "Sec. 4.1 of the paper, as quoted in public"),
)
