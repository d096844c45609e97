// The colours that were chosen here before, set before anything is drawn.
'use strict';
const chosen = localStorage.getItem('theme');
if (chosen === 'light' || chosen === 'dark') document.documentElement.dataset.theme = chosen;
